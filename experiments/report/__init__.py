"""Tables, figures and configurations, made from records."""
