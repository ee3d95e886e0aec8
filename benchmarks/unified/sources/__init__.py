"""The sources of the unified benchmark's data: one module for each config, and what they share."""
