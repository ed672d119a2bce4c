"""Callbacks for training libraries; each module needs the library that it is named after."""
