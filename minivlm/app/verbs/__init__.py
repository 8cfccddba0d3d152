"""One file for each verb of the command line. A verb is a module with

    its docstring       the first line says in one sentence what the verb does
    EXAMPLES            command lines, one a line
    USAGE               optional: the usage line without the program's name
    add_arguments(parser)
    run(arguments)      does it; True or a number above 0 ends the program with exit code 1

and a line in the table of `cli.py`. torch and everything that imports it are imported inside `run`, so that help is
instant.
"""
