"""Everything that knows LLaMA-Factory, one file a seam; imported when LLaMA-Factory's own modules are."""
