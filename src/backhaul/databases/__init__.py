"""What sources, targets and drills share: how servers are reached, asked, and started for a trial."""
