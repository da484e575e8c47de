#!/bin/sh
# Generates the recordings with Debian 13's espeak-ng 1.52 and sox 14.4: sentences, pauses, a little noise.
set -eu
cd "$(dirname "$0")"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
say() { # say FILE VOICE WORDS_A_MINUTE TEXT
    espeak-ng -v "$2" -s "$3" -w "$folder/said.wav" "$4"
    sox -R -D "$folder/said.wav" -r 16000 -c 1 -b 16 "$1"
}
pause() { sox -R -n -r 16000 -c 1 -b 16 "$1" trim 0 "$2"; }
noisy() { # noisy FILE LEVEL FROM...
    file=$1 level=$2
    shift 2
    sox -R "$@" "$folder/clean.wav"
    sox -R "$folder/clean.wav" -p synth whitenoise vol "$level" | sox -R -D -m "$folder/clean.wav" - -b 16 "$file"
}
say "$folder/a.wav" en-us 150 "Many requests, moving as one."
say "$folder/b.wav" en-us 170 "A shoal of fish turns without a leader."
say "$folder/c.wav" en-gb 140 "Each keeps its own state, and nobody waits."
say "$folder/d.wav" de 150 "Guten Morgen. Wie geht es dir heute?"
say "$folder/e.wav" es 150 "Hola, buenos dias."
pause "$folder/short.wav" 0.7
pause "$folder/long.wav" 1.6
noisy english.wav 0.002 "$folder/long.wav" "$folder/a.wav" "$folder/short.wav" "$folder/b.wav" "$folder/long.wav"
noisy british.wav 0.01 "$folder/short.wav" "$folder/c.wav" "$folder/long.wav" "$folder/a.wav"
noisy mixed.wav 0.002 "$folder/d.wav" "$folder/long.wav" "$folder/e.wav" "$folder/short.wav"
