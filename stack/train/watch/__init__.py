"""Who hears a run: the log, the screen, the speed, the plan."""
