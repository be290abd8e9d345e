"""Everything that depends on LLaMA-Factory, one file per seam; imported when LLaMA-Factory's own modules are."""
