"""The converter: index, codecs, mapping, plan, pipeline, writer, verify and the command line."""
