"""Generate again what failed its checks: which requests follow, what a row's result is, what earlier attempts hold."""
