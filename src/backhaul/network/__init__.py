"""Between hosts: who is who, links, chain, multicast."""
