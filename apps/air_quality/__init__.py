"""Air-quality forecasting."""
