"""What a comparison trains: recipes and method specs."""
