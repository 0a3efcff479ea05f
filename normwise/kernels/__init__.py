"""The backends: how the four steps are computed."""
