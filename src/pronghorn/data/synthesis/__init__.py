"""Question and answer rows out of documents: read, cut into chunks, asked about, filtered, without duplicates.

The writing itself is done by a function that the caller brings; `pronghorn.inference.synthesis` brings a model's.
"""
