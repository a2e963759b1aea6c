from ensemble_distill.cli.main import main

main()
