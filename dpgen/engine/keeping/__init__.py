"""Keep an engine for several jobs."""
