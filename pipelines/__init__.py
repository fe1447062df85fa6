"""Composition only: definitions, jobs, schedules, sensors, and the command line. Logic lives in `sae_core`."""
