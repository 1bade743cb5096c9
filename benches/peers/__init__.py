"""The programs that Sapper is measured against, each in the way its kind is usually written.

The Python ones run with the newest interpreter that has TLS-PSK call-backs and import nothing but the
standard library; that is why they share `common` and nothing of Sapper.
"""
