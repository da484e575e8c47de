"""Certificates of the address for clients: the operator's files or the node's own CA, checked, served, and renewed.

pair     a certificate chain and its key, checked before Envoy gets them
own_ca   the CA of `--tls auto`, and the certificates that it issues
served   the folder that Envoy watches, with the pair in use
"""
