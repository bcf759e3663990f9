class BadInput(Exception):
    pass
