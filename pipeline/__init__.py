"""Everything one training process needs: config, models, data, training, tracking."""
