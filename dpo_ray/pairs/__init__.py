"""From raw preference rows to stored, planned and packed token pairs: no Ray, no model."""
