"""What the unified benchmark's data are built from: one module for each config, and what they share."""
