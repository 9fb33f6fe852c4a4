"""Commands on models: train, eval, generate, memory, corpus, ngram, task."""
