"""The tests of the project.

unit/ mirrors the package; matrix/ tries every adapter on every backbone; interruption/ holds kills and runs on several
processes; end_to_end/ holds whole commands; helpers/ is what several tests share. Read helpers/tiny.py first."""
