"""Getting processes onto machines. No model logic."""
