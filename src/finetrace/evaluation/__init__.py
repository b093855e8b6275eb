"""Is an attribution right? Metrics, intervals, and judges of behaviour."""
