"""From files of preference rows to packed batches: read, split, tokenise, pack, load, generate."""
