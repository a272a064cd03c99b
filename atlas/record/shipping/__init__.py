"""The process that sends journals to MLflow, and what other processes see of it."""
