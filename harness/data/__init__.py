"""Where models, texts and task files come from, and the digests that identify them; bundles for machines without network."""
