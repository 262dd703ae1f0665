"""Fine-tuning of ingredients and search over recipe keys with Ray Tune, and the demo. May import every package."""
