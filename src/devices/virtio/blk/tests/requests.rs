//! Every request of section 5.2.6, and what its bytes must be checked for.

use super::fake::{Call, boot};
use super::*;

#[test]
fn section_5_2_6_in_reads_what_the_disk_has() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        for (sector, len) in [
            (0, 512),
            (1, 512),
            (8, 4096),
            (3, 1536),
            (2047, 512),
            (0, 1 << 20),
        ] {
            let answer = guest.read(sector, len);
            assert_eq!((answer.status, answer.len), (OK, len as u32 + 1));
            assert!(
                answer.data == pattern(sector * 512, len as u64),
                "{sector} {len}"
            );
        }
    });
}

#[test]
fn section_5_2_6_out_writes_those_sectors_and_no_other() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        let mut model = pattern(0, SIZE);
        for (sector, len) in [(0, 512), (5, 1024), (2047, 512), (100, 65536)] {
            let data = pattern(SIZE + sector, len);
            assert_eq!(guest.write(sector, &data), status(OK));
            let at = sector as usize * 512;
            model[at..at + data.len()].copy_from_slice(&data);
        }
        assert!(guest.image() == model);
        assert!(guest.read(0, SIZE as usize).data == model);
    });
}

#[test]
fn section_5_2_6_flush_succeeds_on_a_read_only_disk_too() {
    for ro in [false, true] {
        let mut guest = Setup { ro, ..Setup::raw() }.boot();
        assert_eq!(guest.flush(), status(OK));
        let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_FLUSH, 0), &[7; 512], 0);
        assert_eq!(
            guest.chain_request(&buffers).status,
            OK,
            "data is not needed, but no error"
        );
    }
}

#[test]
fn section_5_2_6_get_id_is_nul_padded_to_twenty_bytes() {
    let ids = [
        (None, [0; 20]),
        (Some("ROOT"), *b"ROOT\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        (Some("twenty characters id"), *b"twenty characters id"),
    ];
    for (id, bytes) in ids {
        let id = id.map(String::from);
        let mut guest = Setup { id, ..Setup::raw() }.boot();
        let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
        assert_eq!(
            answer,
            Answer {
                status: OK,
                data: bytes.to_vec(),
                len: 21
            }
        );
    }
}

#[test]
fn section_5_2_6_get_id_fills_what_fits() {
    let id = Some("twenty characters id".into());
    let mut guest = Setup { id, ..Setup::raw() }.boot();
    let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 6);
    assert_eq!(
        answer,
        Answer {
            status: OK,
            data: b"twenty".to_vec(),
            len: 7
        }
    );
    let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 0);
    assert_eq!(answer, status(OK));
    // The status does not count: the bytes between were not written.
    let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 512);
    assert_eq!((answer.status, answer.len), (OK, 20));
    assert_eq!(answer.data[..20], *b"twenty characters id");
    assert_eq!(answer.data[20..], [UNTOUCHED; 492]);
}

#[test]
fn section_5_2_6_2_write_zeroes_makes_reads_return_zeroes_whatever_unmap_says() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        let mut model = pattern(0, SIZE);
        for (sector, sectors, unmap) in [(8, 8, 0), (32, 64, 1), (3, 1, 1), (2047, 1, 0)] {
            assert_eq!(
                guest.write_zeroes(&[segment(sector, sectors, unmap)]),
                status(OK)
            );
            let at = sector as usize * 512;
            model[at..at + sectors as usize * 512].fill(0);
        }
        assert!(guest.read(0, SIZE as usize).data == model);
    });
}

#[test]
fn section_5_2_6_2_discard_leaves_other_sectors_alone() {
    let mut guest = Setup::sparse_raw().boot();
    assert_eq!(guest.discard(&[segment(8, 16, 0)]), status(OK));
    assert_eq!(
        guest.discard(&[segment(101, 3, 0), segment(1024, 1024, 0)]),
        status(OK)
    );
    let data = guest.read(0, SIZE as usize).data;
    for (from, to) in [(0, 8), (24, 101), (104, 1024)] {
        let (from, to) = (from * 512, to * 512);
        let bytes = &data[from as usize..to as usize];
        assert!(*bytes == pattern(from, to - from), "{from} to {to}");
    }
    assert_eq!(guest.image().len() as u64, SIZE);
}

#[test]
fn section_5_2_6_discards_and_zeroes_have_up_to_as_many_segments_as_offered() {
    let (mut guest, script) = boot(|_, _| {});
    let max = guest.config()[40..44]
        .try_into()
        .map(u32::from_le_bytes)
        .unwrap();
    let segments: Vec<_> = (0..max).map(|i| segment(u64::from(i) * 8, 2, 0)).collect();
    let calls = |call: fn(u64) -> Call| (0..u64::from(max)).map(|i| call(i * 4096)).collect();

    assert_eq!(guest.discard(&segments), status(OK));
    let discards: Vec<_> = calls(|offset| Call::Discard(offset, 1024));
    assert_eq!(script.calls(), discards);
    script.forget();
    assert_eq!(guest.write_zeroes(&segments), status(OK));
    let zeroes: Vec<_> = calls(|offset| Call::WriteZeroes(offset, 1024, false));
    assert_eq!(script.calls(), zeroes);
    script.forget();

    let too_many: Vec<_> = (0..=max).map(|_| segment(0, 1, 0)).collect();
    assert_eq!(guest.discard(&too_many), status(IOERR));
    assert_eq!(guest.write_zeroes(&too_many), status(IOERR));
    for len in [0, 1, 15, 17, 31] {
        assert_eq!(
            guest.request(VIRTIO_BLK_T_DISCARD, 0, &vec![0; len], 0),
            status(IOERR)
        );
    }
    assert_eq!(script.calls(), []);
}

#[test]
fn section_5_2_6_empty_segments_and_empty_data_are_nothing_to_do() {
    let (mut guest, script) = boot(|_, _| {});
    assert_eq!(guest.discard(&[segment(5, 0, 0)]), status(OK));
    assert_eq!(guest.write_zeroes(&[segment(SIZE / 512, 0, 1)]), status(OK));
    assert_eq!(guest.read(0, 0), status(OK));
    assert_eq!(guest.write(SIZE / 512, &[]), status(OK));
    assert_eq!(script.calls(), []);
}

#[test]
fn section_5_2_6_2_unmap_reaches_the_image_if_it_may_deallocate() {
    let (mut guest, script) = boot(|_, _| {});
    guest.write_zeroes(&[segment(0, 8, 1), segment(8, 8, 0)]);
    let expected = [
        Call::WriteZeroes(0, 4096, true),
        Call::WriteZeroes(4096, 4096, false),
    ];
    assert_eq!(script.calls(), expected);

    let (mut guest, script) = boot(|_, limits| limits.discard_granularity = 0);
    assert_eq!(guest.config()[56], 0, "write_zeroes_may_unmap");
    assert_eq!(guest.write_zeroes(&[segment(0, 8, 1)]), status(OK));
    assert_eq!(script.calls(), [Call::WriteZeroes(0, 4096, false)]);
}

#[test]
fn section_5_2_6_2_unknown_flags_are_unsupp() {
    let (mut guest, script) = boot(|_, _| {});
    for bit in 0..32 {
        let flagged = [segment(0, 8, 0), segment(8, 8, 1 << bit)];
        assert_eq!(guest.discard(&flagged), status(UNSUPP), "bit {bit}");
        if bit > 0 {
            assert_eq!(guest.write_zeroes(&flagged), status(UNSUPP), "bit {bit}");
        }
    }
    assert_eq!(
        script.calls(),
        [],
        "no segment is carried out, the good ones neither"
    );
}

#[test]
fn section_5_2_6_2_writes_to_a_read_only_disk_are_ioerr_and_write_nothing() {
    each_backend(|setup| {
        let mut guest = Setup { ro: true, ..setup }.boot();
        assert_eq!(guest.write(0, &[1; 512]), status(IOERR));
        assert_eq!(guest.discard(&[segment(0, 8, 0)]), status(IOERR));
        assert_eq!(guest.write_zeroes(&[segment(0, 8, 1)]), status(IOERR));
        assert_eq!(guest.write_zeroes(&[segment(0, 8, 2)]), status(UNSUPP));
        assert!(guest.image() == pattern(0, SIZE));
        assert_eq!(guest.read(0, 512).status, OK);
    });
}

#[test]
fn section_5_2_6_unknown_types_are_unsupp() {
    let (mut guest, script) = boot(|_, _| {});
    let known = [0, 1, 4, 8, 11, 13];
    let others = (0..64).filter(|kind| !known.contains(kind));
    for kind in others.chain([0x8000_0000, 0x8000_0001, 1 << 16, u32::MAX]) {
        assert_eq!(
            guest.request(kind, 0, &[], 0),
            status(UNSUPP),
            "type {kind}"
        );
        let answer = guest.request(kind, 0, &[1; 512], 512);
        assert_eq!(answer.status, UNSUPP, "type {kind}");
        assert_eq!(answer.data[1..], [UNTOUCHED; 511]);
    }
    assert_eq!(script.calls(), []);
}

#[test]
fn section_5_2_3_requests_of_features_that_were_not_negotiated_are_unsupp() {
    let mut guest = Setup::sparse_raw()
        .decline(VIRTIO_BLK_F_DISCARD)
        .decline(VIRTIO_BLK_F_WRITE_ZEROES)
        .decline(VIRTIO_BLK_F_FLUSH)
        .boot();
    assert_eq!(guest.discard(&[segment(0, 8, 0)]), status(UNSUPP));
    assert_eq!(guest.write_zeroes(&[segment(0, 8, 0)]), status(UNSUPP));
    assert_eq!(guest.flush(), status(UNSUPP));
    assert!(guest.image() == pattern(0, SIZE));

    let mut full = Setup::raw().boot();
    assert_eq!(full.features & 1 << VIRTIO_BLK_F_DISCARD, 0, "not sparse");
    assert_eq!(full.discard(&[segment(0, 8, 0)]), status(UNSUPP));
}

#[test]
fn section_5_2_6_1_ranges_past_the_capacity_are_ioerr() {
    let (mut guest, script) = boot(|_, _| {});
    let end = SIZE / 512;
    let sectors = [
        end,
        end + 1,
        1 << 32,
        1 << 54,
        1 << 55,
        1 << 56,
        1 << 63,
        u64::MAX - 1,
        u64::MAX,
    ];
    for sector in sectors {
        let read = guest.read(sector, 512);
        assert_eq!((read.status, read.len), (IOERR, 1), "sector {sector}");
        assert_eq!(
            guest.write(sector, &[1; 512]),
            status(IOERR),
            "sector {sector}"
        );
        assert_eq!(guest.discard(&[segment(sector, 1, 0)]), status(IOERR));
        assert_eq!(guest.write_zeroes(&[segment(sector, 1, 0)]), status(IOERR));
    }
    assert_eq!(guest.read(end - 1, 1024).status, IOERR);
    assert_eq!(guest.write(end - 1, &[1; 1024]), status(IOERR));
    assert_eq!(
        guest.discard(&[segment(0, 8, 0), segment(end - 1, 2, 0)]),
        status(IOERR)
    );
    assert_eq!(guest.discard(&[segment(0, u32::MAX, 0)]), status(IOERR));
    assert_eq!(script.calls(), []);
}

#[test]
fn section_5_2_6_segments_larger_than_offered_are_ioerr() {
    let mut guest = Setup::sparse_raw().boot();
    guest.blk.handle().resize(3 << 30).unwrap();
    let max = guest.config()[36..40]
        .try_into()
        .map(u32::from_le_bytes)
        .unwrap();
    assert_eq!(guest.discard(&[segment(0, max, 0)]), status(OK));
    assert_eq!(guest.discard(&[segment(0, max + 1, 0)]), status(IOERR));
    assert_eq!(guest.write_zeroes(&[segment(0, max + 1, 0)]), status(IOERR));
}

#[test]
fn section_5_2_6_1_data_is_whole_sectors() {
    let (mut guest, script) = boot(|_, _| {});
    for len in [1, 511, 513, 1000] {
        assert_eq!(guest.read(0, len).status, IOERR, "{len} bytes");
        assert_eq!(guest.write(0, &vec![1; len]), status(IOERR), "{len} bytes");
    }
    assert_eq!(script.calls(), []);
}

#[test]
fn requests_are_whole_logical_blocks() {
    let (mut guest, script) = boot(|setup, _| setup.block_size = 4096);
    for (sector, len) in [(0, 512), (1, 4096), (7, 4096), (8, 3584), (8, 4608)] {
        assert_eq!(guest.read(sector, len).status, IOERR, "{sector} {len}");
        assert_eq!(
            guest.write(sector, &vec![1; len]),
            status(IOERR),
            "{sector} {len}"
        );
        let segment = segment(sector, len as u32 / 512, 0);
        assert_eq!(guest.discard(&[segment]), status(IOERR), "{sector} {len}");
        assert_eq!(
            guest.write_zeroes(&[segment]),
            status(IOERR),
            "{sector} {len}"
        );
    }
    assert_eq!(script.calls(), []);
    assert_eq!(guest.read(8, 8192).data, pattern(4096, 8192));
    assert_eq!(script.calls(), [Call::Read(4096, 8192)]);
}

#[test]
fn data_in_the_wrong_direction_is_ioerr() {
    let (mut guest, script) = boot(|_, _| {});
    let read = guest.request(VIRTIO_BLK_T_IN, 0, &[1; 512], 512);
    assert_eq!(read.status, IOERR);
    let write = guest.request(VIRTIO_BLK_T_OUT, 0, &[1; 512], 512);
    assert_eq!(write.status, IOERR);
    assert_eq!(write.data[1..], [UNTOUCHED; 511]);
    assert_eq!(script.calls(), []);
}

#[test]
fn a_header_cut_short_is_ioerr() {
    let (mut guest, script) = boot(|_, _| {});
    for len in 0..16 {
        let header = &header(VIRTIO_BLK_T_IN, 0)[..len];
        let answer = guest.raw_request(header, &[], 512);
        assert_eq!(answer.status, IOERR, "{len} bytes");
    }
    assert_eq!(guest.raw_request(&[], &[], 0), status(IOERR));
    assert_eq!(script.calls(), []);
}

#[test]
fn section_5_2_6_the_reserved_field_of_the_header_is_ignored() {
    let mut guest = Setup::raw().boot();
    let mut header = header(VIRTIO_BLK_T_IN, 1);
    header[4..8].fill(0xff);
    assert_eq!(guest.raw_request(&header, &[], 512).data, pattern(512, 512));
}

#[test]
fn a_request_without_a_status_byte_is_returned_with_length_0() {
    let (mut guest, script) = boot(|_, _| {});
    guest.store(BUFFERS, &header(VIRTIO_BLK_T_OUT, 0));
    for buffers in [
        vec![readable(BUFFERS, 16)],
        vec![readable(BUFFERS, 16), readable(BUFFERS, 512)],
        vec![readable(BUFFERS, 16), writable(BUFFERS, 0)],
    ] {
        let head = guest.drivers[0].chain(&buffers);
        guest.drivers[0].submit(head);
        assert_eq!(guest.drivers[0].wait_used(), (head, 0));
    }
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

#[test]
fn section_2_7_8_2_the_used_length_counts_from_the_first_writable_byte() {
    let (mut guest, script) = boot(|_, _| {});
    script.fail(|call| matches!(call, Call::Read(..)), libc::EIO);
    let failed = guest.read(0, 512);
    assert_eq!((failed.status, failed.len), (IOERR, 1));
    assert_ne!(
        failed.data[0], UNTOUCHED,
        "as many bytes as it says were written"
    );
    assert_eq!(failed.data[1..], [UNTOUCHED; 511]);
    script.heal();
    assert_eq!(guest.read(0, 512).len, 513);
}

#[test]
fn section_5_2_6_2_a_flush_is_asked_of_the_image_after_the_writes_before_it() {
    let (mut guest, script) = boot(|_, _| {});
    guest.write(0, &[1; 512]);
    guest.write(1, &[1; 512]);
    guest.flush();
    let expected = [Call::Write(0, 512), Call::Write(512, 512), Call::Flush];
    assert_eq!(script.calls(), expected);
}

#[test]
fn section_5_2_6_2_without_flush_and_config_wce_a_write_is_durable_when_it_completes() {
    let (mut guest, script) = boot(|setup, _| {
        *setup = setup
            .clone()
            .decline(VIRTIO_BLK_F_FLUSH)
            .decline(VIRTIO_BLK_F_CONFIG_WCE);
    });
    assert_eq!(guest.write(0, &[1; 512]), status(OK));
    assert_eq!(guest.write_zeroes(&[segment(0, 1, 0)]), status(OK));
    let expected = [
        Call::Write(0, 512),
        Call::Flush,
        Call::WriteZeroes(0, 512, false),
        Call::Flush,
    ];
    assert_eq!(script.calls(), expected);
    script.fail(|call| call == Call::Flush, libc::EIO);
    assert_eq!(guest.write(0, &[1; 512]), status(IOERR));
}

#[test]
fn section_5_2_6_2_with_writeback_0_a_write_is_durable_when_it_completes() {
    let (mut guest, script) = boot(|_, _| {});
    assert_eq!(guest.config()[32], 1);
    guest.blk.write_config(32, &[0]);
    assert_eq!(guest.config()[32], 0);
    assert_eq!(guest.write(0, &[1; 512]), status(OK));
    assert_eq!(script.calls(), [Call::Write(0, 512), Call::Flush]);
    script.forget();
    guest.blk.write_config(32, &[1]);
    assert_eq!(guest.write(0, &[1; 512]), status(OK));
    assert_eq!(script.calls(), [Call::Write(0, 512)]);
}

#[test]
fn section_2_7_4_1_any_arrangement_of_descriptors_will_do() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        let (head, data, status) = (BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x3000);
        // One byte in each descriptor of the header, and odd pieces of the data.
        guest.store(head, &header(VIRTIO_BLK_T_IN, 2));
        let mut buffers: Vec<_> = (0..16).map(|at| readable(head + at, 1)).collect();
        for (at, len) in [(0, 1), (1, 510), (511, 2), (513, 511)] {
            buffers.push(writable(data + at, len));
        }
        buffers.push(writable(status, 1));
        let answer = guest.chain_request(&buffers);
        assert_eq!((answer.status, answer.len), (OK, 1025));
        assert_eq!(answer.data, pattern(1024, 1024));

        // The status shares the data's descriptor.
        let answer = guest.chain_request(&[readable(head, 16), writable(data, 1025)]);
        assert_eq!((answer.status, answer.len), (OK, 1025));
        assert_eq!(answer.data, pattern(1024, 1024));

        // Header and data share a descriptor; another has the rest of the data.
        guest.store(head, &header(VIRTIO_BLK_T_OUT, 4));
        guest.store(head + 16, &[0x11; 512]);
        let buffers = [
            readable(head, 100),
            readable(head + 100, 428),
            writable(status, 1),
        ];
        assert_eq!(guest.chain_request(&buffers), super::status(OK));
        assert_eq!(guest.read(4, 512).data, [0x11; 512]);
    });
}
