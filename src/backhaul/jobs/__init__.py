"""Jobs: the config of what runs, the runner, its records, holds, the schedule, and who is told."""
