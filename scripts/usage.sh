# Sourced by scripts whose one argument is a folder: --help prints the comment they open with, other flags are refused.
for argument; do
    case $argument in
        -h | --help) sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
        -*) echo "error: no flag $argument; --help says what can be set" >&2; exit 2 ;;
    esac
done
