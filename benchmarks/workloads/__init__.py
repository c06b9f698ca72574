"""What is measured: models, tasks, train steps. Imports from harness only."""
