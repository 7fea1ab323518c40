"""The OpenAI-compatible server of one process: guards -> routes -> choose -> batch -> text -> OpenAI's objects."""
