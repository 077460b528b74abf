"""Start a rank's engine before its job needs it, and keep it for several jobs."""
