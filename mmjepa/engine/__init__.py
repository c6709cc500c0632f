"""The engine: start-up, steps, checkpoints and logs. It knows neither modalities nor what phases mean."""
