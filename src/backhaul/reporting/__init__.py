"""What is known of jobs, for people and programs: text, HTML, metrics, checks. No decisions, no records read."""
