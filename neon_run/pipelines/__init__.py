"""`neon improve PIPELINE`: `improve` for diffusers pipelines. diffusers, an extra, is imported when one is opened."""
