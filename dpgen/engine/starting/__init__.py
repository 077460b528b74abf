"""Start an engine: its devices, files, options, limits of memory and time, and the loading of its model.

In: the configuration, and this rank's place.
Out: a loaded engine, and the steps of text around it.
"""
