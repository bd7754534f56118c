"""One thin file a framework, each importing its own: lightning, transformers, accelerate."""
