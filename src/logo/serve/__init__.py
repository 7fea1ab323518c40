"""The OpenAI-compatible server of one process: guards -> routes -> choose -> batch -> text -> OpenAI's objects.

`bodies`, `errors` and `names` are shared with the routes inside vLLM, and import nothing else from here.
"""
