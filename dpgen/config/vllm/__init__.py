"""Know the fields of vLLM's EngineArgs and SamplingParams by name, without vLLM.

In: a field's name. Out: its type, what took its place in newer versions, or the nearest name.
vLLM itself checks what it is given, in the engine process. Never imports vLLM.
"""
