#!/bin/sh
# Starts Label Studio for people: its secrets from files, its tables and first user, then uWSGI, which its image has.
# `label-studio start` would serve with Django's runserver instead, which is made for development.
set -eu
secret() { cat "/run/secrets/$1"; }
POSTGRE_PASSWORD=$(secret label-studio-database-password)
# Both are used once, when the user is first made. Later change them inside Label Studio.
LABEL_STUDIO_PASSWORD=$(secret label-studio-password)
LABEL_STUDIO_USER_TOKEN=$(secret label-studio-token)
export POSTGRE_PASSWORD LABEL_STUDIO_PASSWORD LABEL_STUDIO_USER_TOKEN

label-studio init
unset LABEL_STUDIO_PASSWORD LABEL_STUDIO_USER_TOKEN
LABEL_STUDIO_FOLDER=$(python3 -c 'from importlib.util import find_spec; print(find_spec("label_studio").submodule_search_locations[0])')
export LABEL_STUDIO_FOLDER
# Here and not in uwsgi.ini: the image's uWSGI is a Python module, whose os.environ is older than that file.
export DJANGO_SETTINGS_MODULE=core.settings.label_studio APP_WEBSERVER=uwsgi
exec uwsgi --ini /maskfleet/uwsgi.ini
