# Sourced by scripts that open with a comment on their use.

usage() { # SCRIPT: prints that comment
    sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$1"
}

only_folder() { # ARGUMENTS: --help prints the comment and ends, another flag is refused
    local argument
    for argument; do
        case $argument in
            -h | --help) usage "$0"; exit ;;
            -*) echo "error: no flag $argument; --help says what can be set" >&2; exit 2 ;;
        esac
    done
}
