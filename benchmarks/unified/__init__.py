"""The unified benchmark: one small model on texts, images, videos and document pages."""
