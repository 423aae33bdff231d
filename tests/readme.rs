//! The README says what the program does: its tables are compared with the code they describe.

use std::collections::BTreeMap;

use clap::CommandFactory;
use sdgen::cli::Cli;
use sdgen::config::Config;

const README: &str = include_str!("../README.md");

/// Rows of the configuration table: key, and the cells behind it.
fn documented() -> BTreeMap<String, Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        let inner = line.trim_matches('|').split('|');
        inner.map(|cell| cell.trim().replace('`', "")).collect()
    };
    let rows = README
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(cells);
    rows.filter(|cells| cells.len() == 4 && cells[0].contains('.'))
        .map(|mut cells| (cells.remove(0), cells))
        .collect()
}

#[test]
fn the_configuration_table_has_every_key_with_its_default() {
    let table = toml::Table::try_from(Config::default()).unwrap();
    let mut rows = documented();
    for (section, keys) in &table {
        for (key, value) in keys.as_table().unwrap() {
            let key = format!("{section}.{key}");
            let row = rows.remove(&key);
            let row = row.unwrap_or_else(|| panic!("`{key}` is not in the README"));
            assert_eq!(row[0], value.to_string(), "default of `{key}`");
        }
    }
    // What is left has no default, and must be a key.
    for (key, row) in rows {
        assert_eq!(row[0], "none", "default of `{key}`");
        let (section, name) = key.split_once('.').unwrap();
        let text = format!("[{section}]\n{name} = \"x\"\n");
        toml::from_str::<Config>(&text).unwrap_or_else(|error| panic!("`{key}`: {error}"));
    }
}

#[test]
fn every_environment_variable_is_named() {
    let source = include_str!("../src/config.rs");
    let constants = source.split("pub const ").skip(1);
    let names: Vec<&str> = constants
        .filter_map(|text| text.split_once(": &str = \"")?.1.split('"').next())
        .filter(|name| {
            name.chars()
                .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
        })
        .collect();
    assert!(names.len() > 15, "{names:?}");
    for name in names {
        assert!(
            README.contains(&format!("`{name}`")),
            "`{name}` is not in the README"
        );
    }
}

#[test]
fn every_command_is_named_and_every_option_of_prompt_exists() {
    let cli = Cli::command();
    for command in cli.get_subcommands() {
        let name = command.get_name();
        assert!(
            README.contains(&format!("`sdgen {name}")),
            "`sdgen {name}` is not in the README"
        );
    }
    let prompt = cli.find_subcommand("prompt").unwrap();
    let section = README.split("`sdgen prompt` knows").nth(1).unwrap();
    let section = section.split("explains them").next().unwrap();
    for word in section.split('`').filter(|word| word.starts_with("--")) {
        let found = prompt
            .get_arguments()
            .any(|arg| arg.get_long() == Some(&word[2..]));
        assert!(
            found || word == "--help",
            "`{word}` is no option of `sdgen prompt`"
        );
    }
}
