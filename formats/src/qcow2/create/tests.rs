use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::super::header::{Header, MAX_HEADER};
use super::super::testing::{assert_sound, qemu_check, qemu_create, qemu_img, qemu_io};
use super::*;
use crate::testing::{directory, image};
use crate::{Image, OptionValue};

fn header_of(path: &Path) -> Header {
    let mut bytes = fs::read(path).unwrap();
    bytes.truncate(MAX_HEADER);
    Header::parse(&bytes).unwrap()
}

/// Creates an image twice over: it is sound, and QEMU can use it.
fn assert_good(path: &Path, options: &CreateOptions) {
    let _ = fs::remove_file(path);
    create(path, options).unwrap_or_else(|error| panic!("{options:?}: {error}"));
    assert_sound(path);
    let header = header_of(path);
    assert_eq!(header.size, options.size);
    assert_eq!(header.cluster_bits, options.cluster_bits);
    assert_eq!(header.refcount_order, options.refcount_order);
    assert_eq!(header.compression, options.compression);
    let total = qemu_check(path);
    let clusters = options.size.div_ceil(1 << options.cluster_bits);
    let allocated = if options.allocates() { clusters } else { 0 };
    assert_eq!(
        total.get("allocated-clusters"),
        Some(&allocated).filter(|it| **it > 0)
    );
    assert_eq!(total.get("fragmented-clusters"), None);
    if options.size == 0 {
        return;
    }
    let last = options.size - 512;
    let write = format!("write -P 7 {last} 512");
    let read = format!("read -P 7 {last} 512");
    let more = format!("write -P 9 0 {}", last.clamp(512, 70 << 10));
    qemu_io(&["read -P 0 0 512", &write, &read, &more], path);
    assert_sound(path);
}

#[test]
fn images_of_every_cluster_size_and_refcount_width_are_sound() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for cluster_bits in [9, 12, 16, 21] {
        for refcount_order in 0..=6 {
            for preallocation in [Preallocation::Off, Preallocation::Metadata] {
                let options = CreateOptions {
                    cluster_bits,
                    refcount_order,
                    preallocation,
                    ..CreateOptions::new((3 << 20) + 512)
                };
                assert_good(&path, &options);
            }
        }
    }
}

#[test]
fn images_of_version_2_are_sound() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for cluster_bits in [9, 16, 21] {
        for preallocation in [Preallocation::Off, Preallocation::Metadata] {
            let options = CreateOptions {
                version: 2,
                cluster_bits,
                preallocation,
                ..CreateOptions::new(1 << 20)
            };
            assert_good(&path, &options);
            assert!(qemu_img("info", &path).contains("compat: 0.10"));
        }
    }
}

#[test]
fn images_with_subclusters_are_sound() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for cluster_bits in [14, 17, 21] {
        for preallocation in [
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Full,
        ] {
            let options = CreateOptions {
                cluster_bits,
                preallocation,
                extended_l2: true,
                compression: Compression::Zstd,
                lazy_refcounts: true,
                ..CreateOptions::new((5 << 20) - 512)
            };
            assert_good(&path, &options);
            let info = qemu_img("info", &path);
            for said in [
                "extended l2: true",
                "compression type: zstd",
                "lazy refcounts: true",
            ] {
                assert!(info.contains(said), "{info}");
            }
        }
    }
}

#[test]
fn images_of_extreme_sizes_are_sound() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for (cluster_bits, size) in [
        (9, 0),
        (9, 512),
        (9, 128 << 30),
        (16, 0),
        (16, 512),
        (16, 20 << 40),
        (21, 1 << 61),
    ] {
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(size)
        };
        assert_good(&path, &options);
    }
}

#[test]
fn many_refcount_blocks_count_themselves() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for (refcount_order, size, table) in [(0, 64 << 20, 1), (4, 40 << 20, 6), (6, 20 << 20, 11)] {
        let options = CreateOptions {
            cluster_bits: 9,
            refcount_order,
            preallocation: Preallocation::Metadata,
            ..CreateOptions::new(size)
        };
        assert_good(&path, &options);
        assert_eq!(header_of(&path).refcount_table_clusters, table);
    }
}

#[test]
fn preallocation_reserves_what_it_says() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for (preallocation, whole) in [
        (Preallocation::Off, false),
        (Preallocation::Metadata, false),
        (Preallocation::Falloc, true),
        (Preallocation::Full, true),
    ] {
        let options = CreateOptions {
            preallocation,
            ..CreateOptions::new(8 << 20)
        };
        let _ = fs::remove_file(&path);
        create(&path, &options).unwrap();
        let on_disk = fs::metadata(&path).unwrap().blocks() * 512;
        assert_eq!(on_disk >= 8 << 20, whole, "{preallocation:?}: {on_disk}");
        assert!(whole || on_disk < 1 << 20);
    }
}

#[test]
fn an_image_over_a_backing_file_shows_its_bytes() {
    let directory = directory();
    let base = directory.path().join("base.raw");
    fs::write(&base, [7; 100 << 10]).unwrap();
    let path = directory.path().join("a.qcow2");
    let backing = Backing {
        name: "base.raw".into(),
        format: "raw".into(),
    };
    for (version, cluster_bits, preallocation) in [
        (2, 16, Preallocation::Off),
        (3, 9, Preallocation::Off),
        (3, 16, Preallocation::Off),
        (3, 16, Preallocation::Metadata),
        (3, 16, Preallocation::Falloc),
    ] {
        let options = CreateOptions {
            version,
            cluster_bits,
            preallocation,
            extended_l2: preallocation != Preallocation::Off,
            backing: Some(backing.clone()),
            ..CreateOptions::new(1 << 20)
        };
        let _ = fs::remove_file(&path);
        create(&path, &options).unwrap();
        assert_sound(&path);
        let header = header_of(&path);
        assert_eq!(header.backing_file.as_deref(), Some("base.raw".as_ref()));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        let reads = ["read -P 7 0 100k", "read -P 0 100k 924k"];
        qemu_io(&reads, &path);
        qemu_io(
            &["write -P 1 1k 1k", "read -P 7 0 1k", "read -P 7 2k 98k"],
            &path,
        );
        assert_sound(&path);
    }
}

#[test]
fn an_external_data_file_is_made_with_its_image() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let data = directory.path().join("a.data");
    for raw in [false, true] {
        for preallocation in [
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Full,
        ] {
            let _ = fs::remove_file(&data);
            let options = CreateOptions {
                preallocation,
                data_file: Some(DataFile {
                    path: data.clone(),
                    name: data.clone().into(),
                    raw,
                }),
                ..CreateOptions::new((1 << 20) + 512)
            };
            assert_good(&path, &options);
            let info = qemu_img("info", &path);
            assert!(
                info.contains(&format!("data file: {}", data.display())),
                "{info}"
            );
            assert!(info.contains(&format!("data file raw: {raw}")), "{info}");
            if raw {
                // What QEMU wrote at the end, at its place.
                let mut bytes = [0; 512];
                let file = File::open(&data).unwrap();
                assert_eq!(file.metadata().unwrap().len(), options.size);
                file.read_exact_at(&mut bytes, 1 << 20).unwrap();
                assert_eq!(bytes, [7; 512]);
            }
        }
    }
}

#[test]
fn after_an_error_neither_image_nor_data_file_is_there() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let data = directory.path().join("a.data");
    let options = CreateOptions {
        data_file: Some(DataFile {
            path: data.clone(),
            name: "a.data".into(),
            raw: false,
        }),
        ..CreateOptions::new(1 << 20)
    };
    fs::write(&path, "mine").unwrap();
    let error = create(&path, &options).unwrap_err();
    assert_eq!(error.key, "path");
    assert!(!data.exists());
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    fs::remove_file(&path).unwrap();
    fs::write(&data, "mine").unwrap();
    let error = create(&path, &options).unwrap_err();
    assert_eq!(error.key, "data_file");
    assert!(!path.exists());
    assert_eq!(fs::read(&data).unwrap(), b"mine");
}

#[test]
fn the_table_of_feature_names_gives_way_to_other_names() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let named = |len: usize| CreateOptions {
        cluster_bits: 9,
        backing: Some(Backing {
            name: "n".repeat(len).into(),
            format: "raw".into(),
        }),
        ..CreateOptions::new(1 << 20)
    };
    // 112 of the header, 16 of the format, 8 of the end.
    create(&path, &named(376)).unwrap();
    assert_eq!(header_of(&path).backing_file.unwrap().len(), 376);
    fs::remove_file(&path).unwrap();
    let error = create(&path, &named(377)).unwrap_err();
    assert_eq!(
        error.message,
        "`cluster_size` is 512: the names of `backing` do not fit into the first cluster"
    );
    create(&path, &named(10)).unwrap();
    let without = fs::read(&path).unwrap();
    assert!(!without.windows(9).any(|bytes| bytes == b"dirty bit"));
    fs::remove_file(&path).unwrap();
    create(
        &path,
        &CreateOptions {
            cluster_bits: 9,
            ..CreateOptions::new(512)
        },
    )
    .unwrap();
    let with = fs::read(&path).unwrap();
    assert!(with.windows(9).any(|bytes| bytes == b"dirty bit"));
}

#[test]
fn what_an_image_cannot_be_is_refused_with_key_value_and_limit() {
    let base = CreateOptions::new(1 << 20);
    let v2 = CreateOptions {
        version: 2,
        ..base.clone()
    };
    let backing = Some(Backing {
        name: "b".into(),
        format: "raw".into(),
    });
    let data_file = Some(DataFile {
        path: "d".into(),
        name: "d".into(),
        raw: true,
    });
    let cases = [
        (
            CreateOptions {
                version: 4,
                ..base.clone()
            },
            "version",
            "`version` is 4, expected 2 or 3",
        ),
        (
            CreateOptions {
                cluster_bits: 8,
                ..base.clone()
            },
            "cluster_size",
            "is 2^8 bytes, expected 512",
        ),
        (
            CreateOptions {
                cluster_bits: 22,
                ..base.clone()
            },
            "cluster_size",
            "is 2^22 bytes",
        ),
        (
            CreateOptions {
                refcount_order: 7,
                ..base.clone()
            },
            "refcount_bits",
            "is 2^7, expected 64",
        ),
        (
            CreateOptions {
                size: 513,
                ..base.clone()
            },
            "size",
            "is 513, expected a multiple of 512",
        ),
        (
            CreateOptions {
                size: 1 << 63,
                ..base.clone()
            },
            "size",
            "expected less than 2^63",
        ),
        (
            CreateOptions {
                size: 1 << 60,
                ..base.clone()
            },
            "size",
            "is 1048576TiB, expected at most 2048TiB",
        ),
        (
            CreateOptions {
                extended_l2: true,
                cluster_bits: 13,
                ..base.clone()
            },
            "cluster_size",
            "is 8192, expected 16KiB or more with `extended_l2`",
        ),
        (
            CreateOptions {
                refcount_order: 3,
                ..v2.clone()
            },
            "refcount_bits",
            "needs `version = 3`",
        ),
        (
            CreateOptions {
                extended_l2: true,
                ..v2.clone()
            },
            "extended_l2",
            "needs `version = 3`",
        ),
        (
            CreateOptions {
                lazy_refcounts: true,
                ..v2.clone()
            },
            "lazy_refcounts",
            "needs `version = 3`",
        ),
        (
            CreateOptions {
                compression: Compression::Zstd,
                ..v2.clone()
            },
            "compression_type",
            "needs `version = 3`",
        ),
        (
            CreateOptions {
                data_file: data_file.clone(),
                ..v2
            },
            "data_file",
            "needs `version = 3`",
        ),
        (
            CreateOptions {
                backing: backing.clone(),
                preallocation: Preallocation::Full,
                ..base.clone()
            },
            "preallocation",
            "hides the `backing` file",
        ),
        (
            CreateOptions {
                backing,
                data_file,
                ..base.clone()
            },
            "data_file_raw",
            "with a `backing` file",
        ),
        (
            CreateOptions {
                backing: Some(Backing {
                    name: "b".repeat(1024).into(),
                    format: "raw".into(),
                }),
                ..base
            },
            "backing",
            "has 1024 bytes, expected 1 to 1023",
        ),
    ];
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for (options, key, message) in cases {
        let error = create(&path, &options).unwrap_err();
        assert_eq!(error.key, key, "{}", error.message);
        assert!(error.message.contains(message), "{}", error.message);
        assert!(!path.exists());
    }
}

fn from_image(image: &Image) -> CreateOptions {
    CreateOptions::from_image(image).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_options_of_the_configuration_are_those_of_the_image() {
    let directory = directory();
    let absolute = fs::canonicalize(directory.path()).unwrap();
    let words = |word: &str| OptionValue::Word(word.to_owned());
    let image = Image {
        size: Some(1 << 30),
        options: vec![
            ("cluster_size", OptionValue::Number(128 << 10)),
            ("compression_type", words("zstd")),
            ("extended_l2", OptionValue::Bool(true)),
            ("lazy_refcounts", OptionValue::Bool(true)),
            ("preallocation", words("metadata")),
            ("refcount_bits", OptionValue::Number(64)),
            ("version", OptionValue::Number(3)),
            (
                "data_file",
                OptionValue::Path(directory.path().join("d.raw")),
            ),
            ("data_file_raw", OptionValue::Bool(true)),
            ("cache_size", OptionValue::Number(1 << 20)),
        ],
        ..image(&directory.path().join("a.qcow2"))
    };
    let want = CreateOptions {
        size: 1 << 30,
        version: 3,
        cluster_bits: 17,
        refcount_order: 6,
        extended_l2: true,
        compression: Compression::Zstd,
        lazy_refcounts: true,
        preallocation: Preallocation::Metadata,
        backing: None,
        data_file: Some(DataFile {
            path: directory.path().join("d.raw"),
            name: absolute.join("d.raw").into(),
            raw: true,
        }),
    };
    assert_eq!(from_image(&image), want);
    let listed: Vec<_> = OPTIONS.iter().map(|option| option.name).collect();
    let set: Vec<_> = image.options.iter().map(|(name, _)| *name).collect();
    assert_eq!(listed, set);
    let plain = Image {
        options: Vec::new(),
        ..image
    };
    assert_eq!(from_image(&plain), CreateOptions::new(1 << 30));
    let full = Image {
        sparse: false,
        ..plain
    };
    assert_eq!(from_image(&full).preallocation, Preallocation::Falloc);
}

#[test]
fn values_that_no_image_has_are_refused() {
    let directory = directory();
    for (key, value, message) in [
        (
            "cluster_size",
            1000,
            "`cluster_size` is 1000, expected a power of two, 512 to 2MiB",
        ),
        ("cluster_size", 4 << 20, "`cluster_size` is 4194304"),
        ("cluster_size", 0, "`cluster_size` is 0"),
        (
            "refcount_bits",
            0,
            "`refcount_bits` is 0, expected a power of two, 1 to 64",
        ),
        ("refcount_bits", 24, "`refcount_bits` is 24"),
        ("refcount_bits", 128, "`refcount_bits` is 128"),
        (
            "version",
            1 << 32 | 3,
            "`version` is 4294967295, expected 2 or 3",
        ),
    ] {
        let image = Image {
            size: Some(1 << 30),
            options: vec![(key, OptionValue::Number(value))],
            ..image(&directory.path().join("a.qcow2"))
        };
        let error = CreateOptions::from_image(&image).unwrap_err();
        assert_eq!(error.key, key);
        assert!(error.message.starts_with(message), "{}", error.message);
    }
    let raw_alone = Image {
        options: vec![("data_file_raw", OptionValue::Bool(true))],
        ..image(&directory.path().join("a.qcow2"))
    };
    let error = CreateOptions::from_image(&raw_alone).unwrap_err();
    assert_eq!(error.key, "data_file_raw");
    let no_size = image(&directory.path().join("a.qcow2"));
    let error = CreateOptions::from_image(&no_size).unwrap_err();
    assert_eq!(error.key, "size");
}

#[test]
fn a_backing_file_is_named_so_that_both_can_be_moved_together() {
    let directory = directory();
    let top = directory.path();
    for sub in ["vm", "vm/disks", "bases"] {
        fs::create_dir(top.join(sub)).unwrap();
    }
    for (base, name) in [
        ("vm/base.raw", "base.raw"),
        ("vm/disks/base.img", "disks/base.img"),
        ("bases/base.raw", "../bases/base.raw"),
        ("vm/a:b.raw", "./a:b.raw"),
    ] {
        let base = top.join(base);
        fs::write(&base, [1; 8192]).unwrap();
        let image = Image {
            backing: vec![base],
            ..image(&top.join("vm/a.qcow2"))
        };
        let options = from_image(&image);
        let backing = options.backing.clone().unwrap();
        assert_eq!(
            (backing.name, backing.format),
            (name.into(), "raw".to_owned())
        );
        assert_eq!(options.size, 8192);
        create(&image.path, &options).unwrap();
        qemu_io(&["read -P 1 0 8192"], &image.path);
        fs::remove_file(&image.path).unwrap();
    }
    let elsewhere = Image {
        size: Some(512),
        backing: vec!["/dev/nowhere.raw".into()],
        ..image(&top.join("vm/a.qcow2"))
    };
    let backing = from_image(&elsewhere).backing.unwrap();
    assert_eq!(backing.name, "/dev/nowhere.raw");
}

#[test]
fn the_size_of_a_qcow2_backing_file_is_that_of_its_disk() {
    let directory = directory();
    let base = directory.path().join("base.qcow2");
    qemu_create("", &base, "3G");
    assert_eq!(super::image::backing_size(&base, "qcow2").unwrap(), 3 << 30);
    fs::write(&base, "no image").unwrap();
    let error = super::image::backing_size(&base, "qcow2").unwrap_err();
    assert_eq!(error.key, "backing");
    assert!(error.message.contains("is no usable qcow2 image"));
    let error = super::image::backing_size(directory.path(), "raw").unwrap_err();
    assert!(error.message.contains("it is no file and no block device"));
}

#[test]
fn a_backing_file_whose_size_or_format_does_not_fit_is_refused() {
    let directory = directory();
    let base = directory.path().join("base.raw");
    fs::write(&base, [1; 1000]).unwrap();
    let of = |base: PathBuf| Image {
        backing: vec![base],
        ..image(&directory.path().join("a.qcow2"))
    };
    let error = CreateOptions::from_image(&of(base)).unwrap_err();
    assert_eq!(
        error.message,
        "the `backing` file has 1000 bytes, no multiple of `block_size`, 512"
    );
    assert_eq!(error.help.as_deref(), Some("add `size = 1024`"));
    let error = CreateOptions::from_image(&of("base.unknown".into())).unwrap_err();
    assert_eq!(error.key, "backing");
}
