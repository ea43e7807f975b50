"""Search with a trained model: encoders, indexes, search in two stages."""
