"""The outputs and text parts: what base, base + adapter and merged model answer."""
