"""The conformance suites, shipped as code, so that a third party's backend can run them: one package a port."""
