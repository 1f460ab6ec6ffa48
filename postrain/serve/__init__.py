"""`postrain serve`: a model over HTTP, in OpenAI's words and in SGLang's.

Prompts are rendered by the function that renders training rows; answers come from the engine that makes rollouts.
"""
