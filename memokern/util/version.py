"""The version of memokern, which ranks that work together must share."""

VERSION = "0.1.0"
